from laser_jax.import_gguf.run import main

if __name__ == "__main__":
    main()
