"""`python -m laser_jax.serve`."""

from laser_jax.files.terminal import fail

try:
    from laser_jax.serve.run import main
except ModuleNotFoundError as error:
    if error.name not in ("starlette", "uvicorn", "prometheus_client", "orjson"):
        raise
    fail(f'{error}: the server wants the extra of that name: pip install "laser-jax[serve]"')

if __name__ == "__main__":
    main()
