from laser_jax.train.before_imports import leave_on_signals

if __name__ == "__main__":
    leave_on_signals()  # before jax and the rest are imported, which takes seconds
    from laser_jax.train.run import main

    main()
