"""The Pod Security standards, as far as a pod's own fields decide: what `baseline` and `restricted` refuse."""

from collections.abc import Iterator, Mapping
from typing import Any

BASELINE_CAPABILITIES = {
    *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD"),
    *("NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
}
RESTRICTED_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"),
}


def baseline(pod: Mapping[str, Any]) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield field
    for volume in pod.get("volumes", []):
        if "hostPath" in volume:
            yield "hostPath"
    for container in (*pod["containers"], *pod.get("initContainers", [])):
        context = container.get("securityContext", {})
        if context.get("privileged"):
            yield "privileged"
        if extra := set(context.get("capabilities", {}).get("add", [])) - BASELINE_CAPABILITIES:
            yield f"capabilities {sorted(extra)}"
        if context.get("procMount", "Default") != "Default":
            yield "procMount"
        if any(port.get("hostPort") for port in container.get("ports", [])):
            yield "hostPort"
        if effective(pod, context, "seccompProfile", {}).get("type") == "Unconfined":
            yield "seccompProfile"


def restricted(pod: Mapping[str, Any]) -> Iterator[str]:
    yield from baseline(pod)
    for volume in pod.get("volumes", []):
        if unusual := volume.keys() - {"name"} - RESTRICTED_VOLUMES:
            yield f"volume {sorted(unusual)}"
    for container in (*pod["containers"], *pod.get("initContainers", [])):
        context = container.get("securityContext", {})
        capabilities = context.get("capabilities", {})
        if context.get("allowPrivilegeEscalation") is not False:
            yield "allowPrivilegeEscalation"
        if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            yield "capabilities"
        if effective(pod, context, "runAsNonRoot", False) is not True:
            yield "runAsNonRoot"
        if effective(pod, context, "runAsUser", 1) == 0:
            yield "runAsUser"
        if effective(pod, context, "seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield "seccompProfile"


def effective(pod: Mapping[str, Any], context: Mapping[str, Any], field: str, default: Any) -> Any:
    """A container's own word, else the pod's."""
    return context.get(field, pod.get("securityContext", {}).get(field, default))
