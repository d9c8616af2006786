# vila-serve on a CPU. The base is Docker's official Python image on Debian 12.
FROM python:3.12-slim-bookworm

ENV PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY . .
# torch is not needed to run an engine for the CPU, but it is a dependency: its build for CPUs is small.
RUN pip install --index-url https://download.pytorch.org/whl/cpu "$(grep ^torch== constraints.txt)" \
    && pip install -c constraints.txt '.[serve]' \
    && useradd --system --uid 10001 vila

USER 10001
WORKDIR /engine
EXPOSE 8000
# VILA_API_KEY is needed, since clients of a container come from another address.
ENTRYPOINT ["vila-serve", "/engine", "--host", "0.0.0.0", "--port", "8000"]
