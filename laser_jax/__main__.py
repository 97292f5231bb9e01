"""`python -m laser_jax COMMAND`, which is `laser COMMAND`."""

from laser_jax.command_line import main

if __name__ == "__main__":
    main()
