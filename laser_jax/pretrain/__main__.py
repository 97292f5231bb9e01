from laser_jax.pretrain.run import main

if __name__ == "__main__":
    main()
