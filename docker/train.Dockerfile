# Train, distill, export, validate. The wheels bring their own CUDA libraries; the machine brings the driver. For nodes of
# a Ray cluster (docker/kuberay.yaml): --build-arg EXTRAS=train,gpu,ray,storage
#
#   docker build -f docker/train.Dockerfile -t compress-train .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" compress-train run recipes/bccd.yaml
FROM python:3.12.11-slim-trixie

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# triton compiles a small launcher on the target; KubeRay asks nodes for their health with wget
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev wget \
    && rm -rf /var/lib/apt/lists/*

ARG EXTRAS=train,gpu
WORKDIR /opt/compress
COPY pyproject.toml README.md LICENSE ./
COPY compress compress
COPY deploy deploy
COPY kernels kernels
RUN pip install ".[${EXTRAS}]"

RUN useradd --create-home --uid 1000 compress
USER compress
WORKDIR /work
ENTRYPOINT ["compress"]
CMD ["--help"]
