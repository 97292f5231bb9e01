from laser_jax.export.run import main

if __name__ == "__main__":
    main()
