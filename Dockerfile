# Ascend NPU. The driver stays on the host: README.md, "In a container", has the line that passes it in.
#   docker build -t bundles .                                                                          Atlas A2
#   docker build -t bundles --build-arg BASE=quay.io/ascend/cann:9.1.0-a3-ubuntu22.04-py3.11 .         Atlas A3
#   docker build -t bundles --build-arg BASE=quay.io/ascend/cann:9.1.0-910-ubuntu22.04-py3.11 .        first generation
# Others: https://quay.io/repository/ascend/cann?tab=tags; all have Python, and look for the driver where it is mounted. CANN and
# the versions in npu_requirements.txt must stand in one row of README.md's table.
ARG BASE=quay.io/ascend/cann:9.1.0-910b-ubuntu22.04-py3.11
FROM ${BASE}
WORKDIR /bundles
# Of the five files the one with the most in it.
COPY SPACH-SMLP/npu_requirements.txt .
RUN pip install --no-cache-dir -r npu_requirements.txt
COPY . .
CMD ["bash"]
