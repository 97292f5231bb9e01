from laser_jax.annotate.run import main

if __name__ == "__main__":
    main()
