"""A stand-in for Ascend's apex (gitee.com/ascend/apex, branch v1.5.0): its names and arguments, and no others."""
