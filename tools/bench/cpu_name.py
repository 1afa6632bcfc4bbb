"""What the benches call the CPU they ran on."""

from pathlib import Path


def cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return 'unknown CPU'
    return next((line.split(':', 1)[1].strip() for line in lines if 'model name' in line),
                'unknown CPU')
