from laser_jax.command_line import ended_in_a_line
from laser_jax.files.terminal import extra

with ended_in_a_line(), extra("serve", "the server"):
    from laser_jax.serve.run import main

if __name__ == "__main__":
    main()
