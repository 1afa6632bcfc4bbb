# Weight decay of the published detection and segmentation runs: 'norm' anywhere in a
# parameter's name means no decay, and everything else is decayed, biases, Ds and A_logs too.
# In the released model the norms of the stem and of the conv downsample had number names
# (patch_embed.2, downsample.3), so the rule missed them and they were decayed. Ours are called
# norm: the two longer keys (the longest match wins) give them their decay back.
dense_decay_keys = {
    'norm': dict(decay_mult=0.),
    'patch_embed.norm': dict(decay_mult=1.),
    'downsample.norm': dict(decay_mult=1.),
}
# The vanilla configs add this one: PatchMerging's norm was named such that the rule found it.
dense_decay_vanilla = {'downsample.norm': dict(decay_mult=0.)}
