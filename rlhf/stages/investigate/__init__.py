"""Experiments on a finished or stopped run: `rlhf doctor investigate RUN` tells apart causes that look alike in its log."""
