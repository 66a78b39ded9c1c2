{{- define "echo-ray.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "echo-ray.s3Keys" -}}
{{- with .Values.storage.s3.existingSecret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom: {secretKeyRef: {name: {{ $.Values.storage.s3.existingSecret }}, key: {{ . }}}}
{{- end }}
{{- end }}
{{- end -}}

{{/* Copies the weights; the replica checks every hash when it loads them. */}}
{{- define "echo-ray.fetch" -}}
{{- $s3 := .Values.storage.s3 -}}
- name: weights
  image: {{ .Values.weights.fetchImage }}
  args:
    - s3
    - sync
    - --no-progress
    {{- with $s3.endpoint }}
    - --endpoint-url={{ . }}
    {{- end }}
    - {{ .Values.weights.uri }}
    - {{ .Values.weights.path }}
  env:
    - {name: HOME, value: /tmp}
    {{- with $s3.region }}
    - {name: AWS_REGION, value: {{ . }}}
    {{- end }}
    {{- include "echo-ray.s3Keys" . | trim | nindent 4 }}
  securityContext:
    {{- include "echo-ray.securityContext" . | nindent 4 }}
  resources:
    requests: {cpu: "1", memory: 512Mi}
    limits: {memory: 1Gi}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: weights, mountPath: {{ .Values.weights.path }}}
{{- end -}}
