# Serve, validate and measure exported files. No PyTorch: the build fails if it comes in.
#
#   docker build -f docker/serve.Dockerfile -t compress-serve .
#   docker run --rm -p 8000:8000 -v "$PWD/runs/first:/models:ro" compress-serve serve /models/student.onnx --host 0.0.0.0
#
# With --build-arg EXTRAS=serve,gpu for ONNX Runtime on a GPU; run with --gpus all. For engines:
#
#   --build-arg EXTRAS=serve,trt --build-arg BUILDER=nvidia/cuda:13.0.1-devel-ubuntu24.04
#
# because PyCUDA comes as source and needs CUDA's headers to compile, but not to run. It would link CURAND, which nobody
# uses.

ARG BUILDER=python:3.12.11-slim-trixie
FROM ${BUILDER} AS wheels
ARG EXTRAS=serve
RUN command -v python3.12 || { apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*; }
WORKDIR /opt/compress
COPY pyproject.toml README.md LICENSE ./
COPY compress compress
COPY deploy deploy
COPY kernels kernels
RUN echo "CUDA_ENABLE_CURAND = False" > ~/.aksetup-defaults.py \
    && python3.12 -m venv /opt/build \
    && /opt/build/bin/pip wheel --no-cache-dir --wheel-dir /wheels ".[${EXTRAS}]"

FROM python:3.12.11-slim-trixie
ARG EXTRAS=serve
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
COPY --from=wheels /wheels /wheels
RUN pip install --no-index --find-links /wheels "compress-detectors[${EXTRAS}]" \
    && rm -rf /wheels \
    && python -c "import importlib.util as u, sys; sys.exit('torch came in' if u.find_spec('torch') else 0)"

RUN useradd --create-home --uid 1000 compress
USER compress
WORKDIR /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["compress"]
CMD ["serve", "--help"]
