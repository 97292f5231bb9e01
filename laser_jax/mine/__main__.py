from laser_jax.mine.run import main

if __name__ == "__main__":
    main()
