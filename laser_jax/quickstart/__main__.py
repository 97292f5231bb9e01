from laser_jax.quickstart.run import main

if __name__ == "__main__":
    main()
