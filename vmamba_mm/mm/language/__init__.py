"""Conversations about images on mmengine's Runner: data sets, pipelines, metrics and chats."""
