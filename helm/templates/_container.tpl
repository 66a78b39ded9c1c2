{{/* Ray's container. Takes what echo-ray.pod takes. */}}
{{- define "echo-ray.container" -}}
{{- $v := .root.Values -}}
- name: {{ ternary "ray-head" "ray-worker" (eq .role "head") }}
  image: {{ include "echo-ray.image" . }}
  imagePullPolicy: {{ $v.image.pullPolicy }}
  ports:
    {{- if eq .role "head" }}
    - {name: gcs-server, containerPort: 6379}
    - {name: dashboard, containerPort: 8265}
    - {name: serve, containerPort: 8000}  # KubeRay makes its Service of it and counts ready pods.
    - {name: as-metrics, containerPort: 44217}
    - {name: dash-metrics, containerPort: 44227}
    {{- else if eq .role "router" }}
    - {name: http, containerPort: 8000}
    {{- else }}
    - {name: replica, containerPort: 8001}
    {{- end }}
    - {name: metrics, containerPort: 8080}
  {{- with include "echo-ray.env" . | trim }}
  env:
    {{- . | nindent 4 }}
  {{- end }}
  {{- include "echo-ray.probes" . | nindent 2 }}
  {{- if eq .role "generator" }}
  lifecycle:
    preStop:
      exec:
        command:
          - /bin/sh
          - -c
          - >-
            exec echo-ray drain "$POD_IP" --port 8001 --within {{ $v.drain.sessionSeconds }}
            {{- if $v.access.enabled }}
            --secret-file /etc/echo-ray/access/replica-secret
            {{- end }}
  {{- else if eq .role "router" }}
  lifecycle:
    preStop:  # Balancers hear of the end before the socket closes.
      exec: {command: [sleep, "5"]}
  {{- end }}
  resources:
    {{- toYaml .group.resources | nindent 4 }}
  securityContext:
    {{- include "echo-ray.securityContext" .root | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: shm, mountPath: /dev/shm}
    {{- if and (eq .role "generator") (has $v.weights.source (list "pvc" "objectStore")) }}
    - {name: weights, mountPath: {{ $v.weights.path }}, readOnly: true}
    {{- end }}
    {{- if and (ne .role "head") $v.access.enabled }}
    - {name: access, mountPath: /etc/echo-ray/access, readOnly: true}
    {{- end }}
    {{- if ne .role "head" }}
    {{- with $v.pods.volumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- end }}
{{- end -}}

{{/* Workers are ready when their part of the service is: KubeRay would ask for a proxy of Serve. */}}
{{- define "echo-ray.probes" -}}
{{- if eq .role "head" -}}
readinessProbe:
  httpGet: {path: /api/healthz, port: 52365}
  {{- else -}}
readinessProbe:
  httpGet: {path: /healthz, port: {{ ternary "http" "replica" (eq .role "router") }}}
  {{- end }}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 3
livenessProbe:
  httpGet: {path: /api/healthz, port: 52365}
  initialDelaySeconds: 30
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 24
{{- end -}}

{{- define "echo-ray.env" -}}
- {name: HOME, value: /tmp}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
{{- if eq .role "head" }}
- {name: RAY_health_check_period_ms, value: "1000"}
- {name: RAY_health_check_timeout_ms, value: "1000"}
- {name: RAY_health_check_failure_threshold, value: "3"}
{{- else }}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ .root.Values.drain.nodeSeconds | quote }}}
{{- with .root.Values.storage.redis.existingSecret }}
- name: ECHO_REDIS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.root.Values.storage.redis.passwordKey }}}}
{{- end }}
{{- include "echo-ray.s3Keys" .root }}
{{- end }}
{{- with .group.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}
