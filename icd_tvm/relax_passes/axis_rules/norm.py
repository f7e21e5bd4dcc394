"""Normalisations and softmax: an order along the normalised axes does not matter."""

from __future__ import annotations

from icd_tvm.relax_passes.axis_rules.dims import Dim
from icd_tvm.relax_passes.axis_rules.site import Site, Unsupported, rule


@rule("nn.softmax", "nn.log_softmax")
def softmax(site: Site) -> None:
    """Equivariant along every axis."""
    data = site.tensor(0)
    site.tie_axes(data.axes, site.result().axes)
    axis = data.axes[site.axis(data.rank)]
    site.role("softmax", axis)
    site.count("softmax over the axis", axis)


@rule("nn.layer_norm", "nn.rms_norm")
def layer_norm(site: Site) -> None:
    """Scale and shift have the normalised axes."""
    data = site.tensor(0)
    normalised = [data.axes[axis] for axis in site.axes(data.rank)]
    site.tie_axes(data.axes, site.result().axes)
    for scale in site.tensors(1):
        site.tie_axes(scale.axes, normalised)
    site.count("the mean is taken over the axis", *normalised)


@rule("nn.batch_norm")
def batch_norm(site: Site) -> None:
    """Scale, shift, mean and variance (also the returned ones) have the channel axis."""
    data, results = site.tensor(0), site.results()
    channel = (data.axes[site.axis(data.rank)],)
    site.tie_axes(data.axes, results[0].axes)
    for vector in (*site.tensors(1), *results[1:]):
        site.tie_axes(vector.axes, channel)
    if site.call.attrs.training:
        others = [axis for axis in data.axes if axis is not channel[0]]
        site.count("the mean is taken over the axis", *others)


@rule("nn.instance_norm")
def instance_norm(site: Site) -> None:
    """Every channel is normalised on its own."""
    data = site.tensor(0)
    channel = (data.axes[site.axis(data.rank, "channel_axis")],)
    _per_channel(site, channel, channel[0])


@rule("nn.group_norm")
def group_norm(site: Site) -> None:
    """Channels may move inside their group, and whole groups among each other."""
    data = site.tensor(0)
    channel = data.axes[site.axis(data.rank, "channel_axis")]
    groups = int(site.call.attrs.num_groups)
    if channel.size < 0 or channel.size % groups:
        raise Unsupported(f"{groups} groups do not divide the channels")
    inner = site.dims.fresh(channel.size // groups)
    site.tie(channel, site.dims.product([site.dims.fresh(groups), inner]))
    _per_channel(site, (channel,), channel)
    site.count("the mean is taken over the axis", channel)


def _per_channel(site: Site, channel: tuple[Dim], skip: Dim) -> None:
    data = site.tensor(0)
    site.tie_axes(data.axes, site.result().axes)
    for scale in site.tensors(1):
        site.tie_axes(scale.axes, channel)
    others = [data.axes[axis] for axis in site.axes(data.rank)]
    site.count("the mean is taken over the axis", *(axis for axis in others if axis is not skip))
