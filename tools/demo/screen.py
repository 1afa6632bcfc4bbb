"""What a demo shows of a tool's output: progress, results, warnings. All of it goes to a file."""
import os
import re
import subprocess
from collections import deque

RECORD = re.compile(r'\d\d/\d\d \d\d:\d\d:\d\d - mmengine - (\w+) - (.*)')
# Of the log's records; those of several lines (the config, hooks, tables) are not among them.
# An evaluation is shown when it is over: then it has no time left.
MATTERS = re.compile(r'(Epoch|Iter)\((train|(val|test)(?!.* eta: ))\) ')
# Of lines that a tool prints itself.
PRINTED = re.compile(r'\[\d+/\d+\] |(accuracy|coco|mIoU|aAcc|mAcc|Precision|Recall|F1|IoU|psnr'
                     r'|ssim)[\w/.]* = |No GPU|Done\.|error')
# Numbers of a step, besides the losses' sum and the time that is left.
DETAILS = re.compile(r'(?<!\S)(?!loss:)(base_lr|lr|time|data_time|memory|grad_norm|[\w.]*loss[\w.]*'
                     r'|[\w.]*acc_\w+|acc): +\S+\s*')
# Warnings of other packages that are no news in a demo.
KNOWN = re.compile('"FileClient"|"HardDiskBackend"|"LocalBackend"|Line NMS|The prefix is not set'
                   '|Dataset .* has not been registered|`build_loss`')


def shown(line):
    """The text to show of a line, or None."""
    record = RECORD.match(line)
    if record is None:
        return line if PRINTED.match(line) else None
    level, text = record.groups()
    if level == 'INFO':
        return DETAILS.sub('', text).rstrip() if MATTERS.match(text) else None
    return None if KNOWN.match(text) else f'{level.lower()}: {text}'


def run(command, cwd, log):
    """Run a command, all of its output into the file ``log``; returns its exit code.

    If that is not 0 the end of the file is shown.
    """
    last = deque(maxlen=40)
    log.parent.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ, PYTHONUNBUFFERED='1')
    with open(log, 'w', encoding='utf-8') as file, subprocess.Popen(
            command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, encoding='utf-8', errors='replace') as process:
        for line in process.stdout:
            file.write(line)
            file.flush()
            last.append(line)
            text = shown(line.rstrip('\n'))
            if text is not None:
                print(text, flush=True)
    if process.returncode:
        print(''.join(last), end='', flush=True)
    return process.returncode
