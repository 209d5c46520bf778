#!/usr/bin/env bash
# Run tests against a vLLM release that has no CPU build yet: its Python code over the compiled parts of the installed build.
#
#     scripts/try_vllm_release.sh 0.33.0 tests/unit/vllm_plugin tests/e2e/test_live_server.py
#
# What the release changed in its compiled parts is not tried. The installed environment is not changed; what is downloaded
# lies in out/vllm-RELEASE and is kept.
set -euo pipefail
release=${1:?usage: scripts/try_vllm_release.sh RELEASE PYTEST-ARGUMENTS...}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
overlay=$root/out/vllm-$release
if [ ! -d "$overlay/vllm" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    platforms=()
    for glibc in 28 31 34 35 39; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
    "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version 3.12 "${platforms[@]}" \
        -d "$work" "vllm==$release"
    mkdir "$work/site"
    "$python" -m zipfile -e "$work"/vllm-*.whl "$work/site"
    find "$work/site" -name '*.so' -delete
    installed=$("$python" -c 'import importlib.util as u; print(u.find_spec("vllm").submodule_search_locations[0])')
    (cd "$installed" && find . -name '*.so' -exec cp --parents {} "$work/site/vllm" \;)
    # vLLM takes the platform from its version
    sed -i "s/^Version: $release\$/Version: $release+cpu/" "$work/site/vllm-$release.dist-info/METADATA"
    # packages that this release needs and the installed one does not; versions of the others stay
    "$python" - "$work/site/vllm-$release.dist-info/METADATA" > "$work/missing" <<'PYTHON'
import importlib.metadata, sys
from pathlib import Path
from packaging.requirements import Requirement

installed = {d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()}
gpu_only = ("nvidia", "torch", "flashinfer", "tilelang", "humming", "quack", "cuda", "apache-tvm", "tokenspeed", "fastsafetensors", "pynvvideocodec", "nvtx",
            "instanttensor")
lines = Path(sys.argv[1]).read_text().split("\n\n")[0].splitlines()
for line in (line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")):
    wanted = Requirement(line)
    name = wanted.name.lower().replace("_", "-")
    if (wanted.marker is None or wanted.marker.evaluate({"extra": ""})) and name not in installed | {"vllm"}:
        if not name.startswith(gpu_only):
            print(f"{wanted.name}{wanted.specifier}")
PYTHON
    "$python" -m pip install -q --no-deps --target "$work/site" -r "$work/missing"
    mkdir -p "$root/out"
    mv "$work/site" "$overlay"
fi
cd "$root"
VLLM_TARGET_DEVICE=cpu PYTHONPATH="$overlay:$root" exec "$python" -m pytest "$@"
