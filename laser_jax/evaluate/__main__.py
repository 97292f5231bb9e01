from laser_jax.evaluate.run import main

if __name__ == "__main__":
    main()
