"""What the modules say their version is: that of the interface, this package's mark behind it."""

#: Code that asks for 2.0 or newer wants Mamba-2, which is here; from 2.3 on it wants Mamba-3.
MAMBA_SSM = '2.2.4+vmamba.mm'
CAUSAL_CONV1D = '1.4.0+vmamba.mm'
