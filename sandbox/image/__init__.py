"""The judge's image: Debian's Python, and this checkout's judge under /opt/judge.

fingerprint.py  which files of `sandbox` go in, and a hash over them that the image carries as a label
prepare.py      runs inside the new root file system: packages, what libraries write on first import, what is cut off
rootfs.py       makes that root file system without a registry (debootstrap), kept as a tar in the user's cache
build.py        rootfs + judge -> an image in an engine
Dockerfile      the same image where a registry is reachable

The judge is a layer of its own above the root file system, so building again after a change of its code takes half a
second, and nothing at all when nothing changed.
"""
