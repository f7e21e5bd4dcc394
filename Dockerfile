# CPU only. docker build -t icd . && docker run --rm icd compile minilm --sparsity unit:0.5
FROM python:3.11-slim AS packages
RUN python -m venv /opt/icd
ENV PATH=/opt/icd/bin:$PATH
WORKDIR /src
COPY requirements.lock ./
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY icd_tvm icd_tvm
RUN pip install --no-cache-dir --no-deps .

# The second stage leaves pip's caches and the build behind. A compiler is for -o model.so, git and
# make for `make test`.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make valgrind \
 && rm -rf /var/lib/apt/lists/*
COPY --from=packages /opt/icd /opt/icd
RUN useradd --create-home icd
USER icd
WORKDIR /home/icd
ENV PATH=/opt/icd/bin:$PATH
COPY --chown=icd configs configs
ENTRYPOINT ["icd"]
CMD ["--help"]
