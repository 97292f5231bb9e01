from laser_jax.encode_corpus.run import main

if __name__ == "__main__":
    main()
