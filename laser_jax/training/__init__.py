"""Parts of the training program: the output directory, stopping, set-up and costs."""
