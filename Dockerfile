# phf on a CPU, from a wheel of this repository: docker build -t phf . && docker run --rm -v "$PWD/out:/work" phf
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
# torch first and on its own: the CPU build is a tenth of the size of the one for GPUs
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY --from=build /wheels /wheels
RUN wheel="$(ls /wheels/*.whl)" && pip install --no-cache-dir "$wheel[all]" && rm -r /wheels
# what compiles small models for the CPU, and an account without rights
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home phf && mkdir /work && chown phf /work
USER phf
WORKDIR /work
ENTRYPOINT ["phf"]
CMD ["run", "demo"]
