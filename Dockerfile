# The CUDA 12 toolkit still builds sm_70 (CUDA 13 dropped it). `docker run --gpus all IMAGE` runs the tests;
# without --gpus the GPU tests are skipped.
FROM nvidia/cuda:12.9.1-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
# Dependencies first, so that a change of the sources does not download them again.
COPY constraints.txt .
RUN python3 -m venv .venv && .venv/bin/pip install -c constraints.txt torch
COPY . .
ENV SPARSE_KERNELS_CUDA=on SPARSE_KERNELS_ARCHS="70;80;90a"
RUN make .venv/.stamp-test

CMD ["make", "test"]
