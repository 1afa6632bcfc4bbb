"""What the modules say their version is: that of the interface, this package's mark behind it."""

#: The newest mamba_ssm with Mamba-1 alone: code that asks for 2.0 or newer wants Mamba-2.
MAMBA_SSM = '1.2.2+vmamba.mm'
CAUSAL_CONV1D = '1.4.0+vmamba.mm'
