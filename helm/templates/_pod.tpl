{{/* Pod template of the head or of a worker group. Takes root, name, role and group. */}}
{{- define "echo-ray.pod" -}}
{{- $v := .root.Values -}}
{{- $worker := ne .role "head" -}}
metadata:
  labels:
    {{- include "echo-ray.selector" .root | nindent 4 }}
    echo-ray/role: {{ .role }}
  {{- with $v.pods.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if $worker }}
  serviceAccountName: {{ include "echo-ray.serviceAccount" .root }}
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: {{ $v.drain.podSeconds }}
  {{- else if not $v.autoscaling.enabled }}
  automountServiceAccountToken: false
  {{- end }}
  securityContext:
    {{- toYaml $v.pods.securityContext | nindent 4 }}
    seccompProfile: {type: RuntimeDefault}
  {{- with $v.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" }}
  {{- with index $.group $key }}
  {{ $key }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  {{- with .group.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $v.pods.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- if and $worker $v.pods.topologyKeys }}
  topologySpreadConstraints:
    {{- range $v.pods.topologyKeys }}
    - topologyKey: {{ . }}
      maxSkew: 1
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "echo-ray.selector" $.root | nindent 10 }}
          ray.io/group: {{ $.name }}
    {{- end }}
  {{- end }}
  {{- if and (eq .role "generator") (eq $v.weights.source "objectStore") }}
  initContainers:
    {{- include "echo-ray.fetch" .root | nindent 4 }}
  {{- end }}
  containers:
    {{- include "echo-ray.container" . | nindent 4 }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: {{ $v.pods.tmp }}}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ .group.shm | default $v.pods.shm }}}
    {{- if and (eq .role "generator") (eq $v.weights.source "pvc") }}
    - name: weights
      persistentVolumeClaim: {claimName: {{ $v.weights.existingClaim }}, readOnly: true}
    {{- else if and (eq .role "generator") (eq $v.weights.source "objectStore") }}
    - name: weights
      emptyDir: {sizeLimit: {{ $v.weights.size }}}
    {{- end }}
    {{- if and $worker $v.access.enabled }}
    - name: access
      secret:
        secretName: {{ $v.access.existingSecret }}
        {{- if eq .role "generator" }}
        items: [{key: replica-secret, path: replica-secret}]
        {{- end }}
    {{- end }}
    {{- if $worker }}
    {{- with $v.pods.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- end }}
{{- end -}}
