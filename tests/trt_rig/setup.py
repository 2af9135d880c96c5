"""Compiles the bridge once for each library that the bindings look for; the soname is what makes it that library."""

from setuptools import Extension, setup

LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")

setup(
    ext_modules=[
        Extension(
            f"tensorrt_libs.bridge_{library}",
            sources=["bridge.c"],
            libraries=["dl"],
            extra_link_args=[f"-Wl,-soname,{library}.so.11"],
        )
        for library in LIBRARIES
    ]
)
