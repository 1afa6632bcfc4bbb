# mmdet's and mmseg's inferencers read a checkpoint before they build the model. With this import
# they read it with the package's own reader, which is safe and knows the published files' names.
custom_imports = dict(imports=['vmamba_mm.mm'], allow_failed_imports=False)
