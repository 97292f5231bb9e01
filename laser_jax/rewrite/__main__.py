from laser_jax.rewrite.run import main

if __name__ == "__main__":
    main()
