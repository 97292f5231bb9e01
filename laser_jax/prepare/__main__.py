from laser_jax.prepare.run import main

if __name__ == "__main__":
    main()
