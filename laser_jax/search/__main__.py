from laser_jax.search.run import main

if __name__ == "__main__":
    main()
