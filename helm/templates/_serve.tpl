{{/* Serve's configuration: deployments/cluster.yaml, then what the values say, then `config`. */}}
{{- define "echo-ray.serveConfig" -}}
{{- $file := .Files.Get "files/serve.yaml" | fromYaml -}}
{{- $app := index $file.applications 0 -}}
{{- $args := mergeOverwrite $app.args (include "echo-ray.args" . | fromYaml) -}}
{{- $_ := set $args "storage" (include "echo-ray.storage" . | fromYaml) -}}
{{- $_ := set $args "access" (include "echo-ray.access" . | fromYaml) -}}
{{- if eq .Values.weights.source "preset" -}}
{{- $_ := unset $args.model "weights" -}}
{{- end -}}
{{- $args = mergeOverwrite $args (deepCopy .Values.config) -}}
{{- $sized := list -}}
{{- range $app.deployments -}}
{{- if eq .name "GeneratorReplica" -}}
{{- $sized = append $sized (include "echo-ray.generator" (dict "root" $ "options" .) | fromYaml) -}}
{{- else if eq .name "Router" -}}
{{- $sized = append $sized (include "echo-ray.router" (dict "root" $ "options" .) | fromYaml) -}}
{{- else -}}
{{- fail (printf "deployments/cluster.yaml: this chart does not know the deployment %s" .name) -}}
{{- end -}}
{{- end -}}
{{- $app = mergeOverwrite $app (dict "args" $args "deployments" $sized) -}}
{{- toYaml (mergeOverwrite $file (dict "applications" (list $app))) -}}
{{- end -}}

{{- define "echo-ray.args" -}}
model:
  preset: {{ .Values.model.preset }}
  device: {{ .Values.model.device }}
  {{- if ne .Values.weights.source "preset" }}
  weights: {{ .Values.weights.path }}
  {{- end }}
session:
  drain_s: {{ .Values.drain.sessionSeconds }}
http:
  host: 0.0.0.0
  port: 8000
  replica_port: 8001
{{- end -}}

{{/* The file's rules of access with the secrets where the pods have them. */}}
{{- define "echo-ray.access" -}}
{{- $file := (index (.Files.Get "files/serve.yaml" | fromYaml).applications 0).args.access | default dict -}}
{{- $kept := omit $file "enabled" "tokens_file" "viewer_secret_env" "viewer_secret_file" "replica_secret_env" "replica_secret_file" -}}
enabled: {{ .Values.access.enabled }}
{{- if .Values.access.enabled }}
{{- range $key := list "viewer" "replica" }}
{{ $key }}_secret_file: /etc/echo-ray/access/{{ $key }}-secret
{{- end }}
{{- if not (dig "access" "jwt" dict .Values.config) }}
tokens_file: /etc/echo-ray/access/tokens
{{- end }}
{{- end }}
{{- with $kept }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The file's rules of storage with the addresses of the values. */}}
{{- define "echo-ray.storage" -}}
{{- $redis := .Values.storage.redis -}}
{{- $s3 := .Values.storage.s3 -}}
{{- $file := (index (.Files.Get "files/serve.yaml" | fromYaml).applications 0).args.storage -}}
{{- $own := dict "url" (include "echo-ray.redisUrl" .) -}}
{{- with $redis.username }}{{ $_ := set $own "username" . }}{{ end -}}
{{- if $redis.existingSecret }}{{ $_ := set $own "password_env" "ECHO_REDIS_PASSWORD" }}{{ end -}}
{{- $_ := set $file "redis" (merge $own (omit ($file.redis | default dict) "url" "username" "password_env" "password_file")) -}}
{{- $own = dict "bucket" $s3.bucket "prefix" $s3.prefix -}}
{{- with $s3.region }}{{ $_ := set $own "region" . }}{{ end -}}
{{- with $s3.endpoint }}{{ $_ := set $own "endpoint" . }}{{ end -}}
{{- if $s3.pathStyle }}{{ $_ := set $own "path_style" true }}{{ end -}}
{{- $_ := set $file "s3" (merge $own (omit ($file.s3 | default dict) "bucket" "prefix" "region" "endpoint")) -}}
{{- if eq .Values.storage.backend "redis" }}{{ $_ := unset $file "s3" }}{{ end -}}
{{- toYaml (set $file "backend" .Values.storage.backend) -}}
{{- end -}}

{{/* One replica a pod: the pod has one `generator`, and the replica's port is fixed. */}}
{{- define "echo-ray.generator" -}}
{{- $total := include "echo-ray.total" (dict "root" .root "role" "generator") | fromJson -}}
{{- $gpus := ternary 1 0 (eq .root.Values.model.device "cuda") -}}
{{- $own := dict
  "ray_actor_options" (dict "num_gpus" $gpus "resources" (dict "generator" 1))
  "graceful_shutdown_timeout_s" .root.Values.drain.replicaSeconds
-}}
{{- $options := mergeOverwrite .options $own (deepCopy .root.Values.serve.generator) -}}
{{- if .root.Values.autoscaling.enabled -}}
{{- $bounds := dict "min_replicas" $total.least "max_replicas" $total.most -}}
{{- $wanted := deepCopy .root.Values.autoscaling.generator -}}
{{- $config := mergeOverwrite ($options.autoscaling_config | default dict) $wanted $bounds -}}
{{- $_ := unset $options "num_replicas" -}}
{{- $_ := set $options "autoscaling_config" $config -}}
{{- else -}}
{{- $_ := unset $options "autoscaling_config" -}}
{{- $_ := set $options "num_replicas" $total.replicas -}}
{{- end -}}
{{- toYaml $options -}}
{{- end -}}

{{/* One router a pod, so that the Service and the monitor see each of them. */}}
{{- define "echo-ray.router" -}}
{{- $total := include "echo-ray.total" (dict "root" .root "role" "router") | fromJson -}}
{{- $own := dict
  "num_replicas" $total.replicas
  "ray_actor_options" (dict "resources" (dict "router" 1))
-}}
{{- toYaml (mergeOverwrite .options $own (deepCopy .root.Values.serve.router)) -}}
{{- end -}}
