{{- define "echo-ray.validateGroups" -}}
{{- $v := .Values -}}
{{- range $name, $group := include "echo-ray.groups" . | fromJson -}}
{{- $at := printf "workerGroups.%s" $name -}}
{{- if not (and $group.role $group.resources) -}}
{{- fail (printf "%s needs a role (router or generator), replicas and resources, or enabled: false" $at) -}}
{{- end -}}
{{- if gt (int $group.least) (int $group.most) -}}
{{- fail (printf "%s: minReplicas %v is more than maxReplicas %v" $at $group.least $group.most) -}}
{{- else if or (lt (int $group.replicas) (int $group.least)) (gt (int $group.replicas) (int $group.most)) -}}
{{- fail (printf "%s: replicas %v must lie between minReplicas %v and maxReplicas %v" $at $group.replicas $group.least $group.most) -}}
{{- end -}}
{{- if and (hasKey $group "minAvailable") (ge (int $group.minAvailable) (int $group.least)) (gt (int $group.minAvailable) 0) -}}
{{- fail (printf "%s.minAvailable %v would hold up every node drain: at most %v, or 0 for no budget" $at $group.minAvailable (sub (int $group.least) 1)) -}}
{{- end -}}
{{- include "echo-ray.validateDevice" (dict "at" $at "group" $group "device" $v.model.device) -}}
{{- include "echo-ray.validateShm" (dict "at" (printf "%s.shm" $at) "size" ($group.shm | default $v.pods.shm)) -}}
{{- end -}}
{{- include "echo-ray.validateShm" (dict "at" "head.shm" "size" ($v.head.shm | default $v.pods.shm)) -}}
{{- range $role := list "router" "generator" -}}
{{- $total := include "echo-ray.total" (dict "root" $ "role" $role) | fromJson -}}
{{- if lt (int $total.most) 1 -}}
{{- fail (printf "no worker group has a %s: give one of workerGroups the role %s and replicas" $role $role) -}}
{{- end -}}
{{- end -}}
{{- if $v.autoscaling.enabled -}}
{{- $total := include "echo-ray.total" (dict "root" . "role" "generator") | fromJson -}}
{{- if ge (int $total.least) (int $total.most) -}}
{{- fail "autoscaling.enabled needs room: give a generator group a maxReplicas above its minReplicas" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "echo-ray.validateDevice" -}}
{{- $gpus := 0 -}}
{{- range $resource, $count := .group.resources.limits | default dict -}}
{{- if hasSuffix "gpu" $resource -}}
{{- $gpus = add $gpus (int $count) -}}
{{- end -}}
{{- end -}}
{{- $wanted := ternary 1 0 (and (eq .group.role "generator") (eq .device "cuda")) -}}
{{- if ne (int $gpus) $wanted -}}
{{- fail (printf "%s.resources.limits has %v GPUs, a %s with model.device %s needs %v: one pod runs one of them" .at $gpus .group.role .device $wanted) -}}
{{- end -}}
{{- end -}}

{{- define "echo-ray.validateShm" -}}
{{- $mib := int (regexFind "^[0-9]+" .size) -}}
{{- if hasSuffix "Gi" .size -}}
{{- $mib = mul $mib 1024 -}}
{{- end -}}
{{- if lt (int $mib) 256 -}}
{{- fail (printf "%s %s is too small for Ray's object store: at least 256Mi" .at .size) -}}
{{- end -}}
{{- end -}}
