"""`python -m laser_jax.search`."""

from laser_jax.search.run import main

if __name__ == "__main__":
    main()
