from laser_jax.think.run import main

if __name__ == "__main__":
    main()
