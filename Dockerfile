# Two images from one file:
#   docker build --target cpu -t espalier:cpu .
#   docker build --target gpu -t espalier:gpu .      then: docker run --gpus all -p 7860:7860 -v espalier:/data espalier:gpu
# torch's and TensorRT's wheels carry the CUDA runtime libraries; the driver comes from the host (NVIDIA Container Toolkit).
# Not built on the project's test machines, which have no Docker engine and no GPU; hadolint checks this file.

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# make: the steps below are the ones of `make setup`; libgomp1: OpenMP for torch's CPU kernels
RUN apt-get update \
 && apt-get install -y --no-install-recommends make=4.3-* libgomp1=12.2.0-* \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 espalier \
 && mkdir /data && chown espalier /data
WORKDIR /home/espalier/app
COPY --chown=espalier requirements.txt Makefile ./
RUN make setup PYTHON=python3.11 && chown -R espalier .venv

FROM nvidia/cuda:13.0.1-devel-ubuntu22.04 AS cuda

FROM python:3.11-bookworm AS pycuda
# pycuda compiles against the CUDA toolkit's headers and links the driver's stub library
COPY --from=cuda /usr/local/cuda-13.0 /usr/local/cuda
ENV CUDA_ROOT=/usr/local/cuda LIBRARY_PATH=/usr/local/cuda/lib64/stubs
COPY requirements-gpu.txt /tmp/requirements-gpu.txt
RUN grep '^pycuda' /tmp/requirements-gpu.txt > /tmp/pycuda.txt \
 && pip wheel --no-cache-dir --no-deps --wheel-dir /wheels -r /tmp/pycuda.txt

FROM base AS app
COPY --chown=espalier . .
USER 1000
ENV ESPALIER_DATA=/data ESPALIER_SIGNING_KEY=/data/signing.key ESPALIER_HOST=0.0.0.0 ESPALIER_PORT=7860
EXPOSE 7860
VOLUME /data
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
  CMD [".venv/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/healthz', timeout=4)"]
CMD [".venv/bin/python", "app.py"]

FROM app AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=pycuda /wheels /wheels
COPY requirements-gpu.txt ./
USER 0
RUN .venv/bin/python -m pip install --quiet --find-links /wheels -r requirements-gpu.txt && rm -rf /wheels
USER 1000

FROM app AS cpu
