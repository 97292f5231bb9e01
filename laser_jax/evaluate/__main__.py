"""`python -m laser_jax.evaluate`."""

from laser_jax.evaluate.run import main

if __name__ == "__main__":
    main()
