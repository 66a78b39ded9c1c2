{{- define "echo-ray.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 47 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 47 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels of objects; never of pods, where a new chart version would build a second cluster. */}}
{{- define "echo-ray.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The one label of the chart on pods. KubeRay's Services want its own app.kubernetes.io/name. */}}
{{- define "echo-ray.selector" -}}
echo-ray/service: {{ include "echo-ray.fullname" . }}
{{- end -}}

{{- define "echo-ray.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "echo-ray.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Image of a pod: the chart's, and over it the group's. Takes root and group. */}}
{{- define "echo-ray.image" -}}
{{- $image := mergeOverwrite (deepCopy .root.Values.image) (.group.image | default dict) -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- $kind := ternary "gpu" "cpu" (eq .root.Values.model.device "cuda") -}}
{{- printf "%s:%s" $image.repository (default (printf "%s-%s" .root.Chart.AppVersion $kind) $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Groups that are on, by name, as JSON: {name: group}. */}}
{{- define "echo-ray.groups" -}}
{{- $groups := dict -}}
{{- range $name, $group := .Values.workerGroups -}}
{{- if and $group (ne (toString $group.enabled) "false") -}}
{{- $replicas := int $group.replicas -}}
{{- $least := ternary (int $group.minReplicas) $replicas (hasKey $group "minReplicas") -}}
{{- $most := ternary (int $group.maxReplicas) $replicas (hasKey $group "maxReplicas") -}}
{{- if not $.Values.autoscaling.enabled -}}
{{- $least = $replicas -}}
{{- $most = $replicas -}}
{{- end -}}
{{- $_ := set $groups $name (mergeOverwrite (deepCopy $group) (dict "least" $least "most" $most)) -}}
{{- end -}}
{{- end -}}
{{- toJson $groups -}}
{{- end -}}

{{/* Replicas of a role over its groups, as JSON: {least, replicas, most}. Takes root and role. */}}
{{- define "echo-ray.total" -}}
{{- $least := 0 -}}{{- $replicas := 0 -}}{{- $most := 0 -}}
{{- range $name, $group := include "echo-ray.groups" .root | fromJson -}}
{{- if eq $group.role $.role -}}
{{- $least = add $least (int $group.least) -}}
{{- $replicas = add $replicas (int $group.replicas) -}}
{{- $most = add $most (int $group.most) -}}
{{- end -}}
{{- end -}}
{{- dict "least" $least "replicas" $replicas "most" $most | toJson -}}
{{- end -}}

{{- define "echo-ray.redisUrl" -}}
{{- if .Values.valkey.enabled -}}
redis://{{ include "echo-ray.fullname" . }}-valkey:6379/0
{{- else -}}
{{- .Values.storage.redis.url -}}
{{- end -}}
{{- end -}}
