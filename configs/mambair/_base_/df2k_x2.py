# The same of DF2K, which is DIV2K and Flickr2K.
_base_ = ['div2k_x2.py']

train_dataloader = dict(dataset=dict(
    gt=['DIV2K/DIV2K_train_HR', 'Flickr2K/Flickr2K_HR'],
    lq=['DIV2K/DIV2K_train_LR_bicubic/X2', 'Flickr2K/Flickr2K_LR_bicubic/X2']))
