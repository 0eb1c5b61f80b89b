# shellcheck shell=bash
# Sourced by pretrain_matris.sh, and for others to source: the allocator of processes on a machine without GPUs, unless
# LD_PRELOAD or GLIBC_TUNABLES say something else.
#
# A step takes large blocks and gives them back by the thousand. By default glibc keeps small blocks that lie between them
# for itself, and so leaves holes that nothing fits in: a step then needs twice the memory of its tensors. tcmalloc
# (Debian's libtcmalloc-minimal4) has other places for small blocks and leaves no holes, in the same time; without it
# glibc is told to keep none, which leaves half of the holes (docs/benchmarks.md). GPUs have an allocator of their own.
if [ -z "${LD_PRELOAD+set}" ] && [ -z "${GLIBC_TUNABLES+set}" ] && [ ! -e /dev/nvidia0 ] && [ ! -e /dev/kfd ]; then
    # Read to its end, and allowed to fail: the script that sources this may end at the first failure of a pipe.
    tcmalloc="$(PATH="$PATH:/sbin" ldconfig -p 2>/dev/null | awk '/libtcmalloc_minimal\.so/ && !n++ { print $NF }' || true)"
    if [ -n "$tcmalloc" ]; then
        export LD_PRELOAD="$tcmalloc"
    else
        export GLIBC_TUNABLES="glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
    fi
fi
