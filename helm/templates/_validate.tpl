{{/* Refuses what cannot work together. Each sentence says what to change. */}}
{{- define "echo-ray.validate" -}}
{{- $v := .Values -}}
{{- $name := include "echo-ray.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "the name %q must begin with a letter: set fullnameOverride" $name) -}}
{{- end -}}
{{- if not $v.image.repository -}}
{{- fail "image.repository is empty: build infra/docker/Dockerfile, push it and name it there" -}}
{{- end -}}
{{- if and $v.access.enabled (not $v.access.existingSecret) -}}
{{- fail "access.existingSecret is empty: name a secret with tokens, viewer-secret and replica-secret, or set access.enabled to false" -}}
{{- end -}}
{{- include "echo-ray.validateStores" . -}}
{{- include "echo-ray.validateWeights" . -}}
{{- include "echo-ray.validateGroups" . -}}
{{- include "echo-ray.validateOwned" . -}}
{{- $d := $v.drain -}}
{{- if lt (int $d.replicaSeconds) (add (int $d.sessionSeconds) 8 | int) -}}
{{- fail (printf "drain.replicaSeconds %v is too short: at least drain.sessionSeconds %v + 8" $d.replicaSeconds $d.sessionSeconds) -}}
{{- else if le (int $d.nodeSeconds) (int $d.replicaSeconds) -}}
{{- fail (printf "drain.nodeSeconds %v must be more than drain.replicaSeconds %v" $d.nodeSeconds $d.replicaSeconds) -}}
{{- else if le (int $d.podSeconds) (add (int $d.sessionSeconds) (int $d.nodeSeconds) | int) -}}
{{- fail (printf "drain.podSeconds %v must be more than drain.sessionSeconds %v + drain.nodeSeconds %v" $d.podSeconds $d.sessionSeconds $d.nodeSeconds) -}}
{{- else if lt (int $v.upgrade.clusterDeletionDelaySeconds) (int $d.podSeconds) -}}
{{- fail (printf "upgrade.clusterDeletionDelaySeconds %v must not be less than drain.podSeconds %v" $v.upgrade.clusterDeletionDelaySeconds $d.podSeconds) -}}
{{- end -}}
{{- if and $v.ingress.enabled $v.ingress.tlsSecret (not $v.ingress.host) -}}
{{- fail "ingress.tlsSecret needs a name that the certificate is for: set ingress.host" -}}
{{- end -}}
{{- if and $v.networkPolicy.enabled (not $v.networkPolicy.operatorNamespace) -}}
{{- fail "networkPolicy.operatorNamespace is empty: name the namespace of the KubeRay operator, or it cannot reach the head" -}}
{{- end -}}
{{- end -}}

{{- define "echo-ray.validateStores" -}}
{{- $v := .Values -}}
{{- $redis := $v.storage.redis -}}
{{- if and $v.valkey.enabled (or $redis.url $redis.existingSecret) -}}
{{- fail "valkey.enabled stands in for storage.redis: clear storage.redis.url and existingSecret, or turn Valkey off" -}}
{{- else if not (or $v.valkey.enabled $redis.url) -}}
{{- fail "storage.redis.url is empty: name the Redis of the sessions, or set valkey.enabled for development" -}}
{{- end -}}
{{- if and (ne $v.storage.backend "redis") (not $v.storage.s3.bucket) -}}
{{- fail (printf "storage.s3.bucket is empty: storage.backend %q needs a bucket; with redis there is none" $v.storage.backend) -}}
{{- end -}}
{{- if $v.gcsFaultTolerance.enabled -}}
{{- $gcs := $v.gcsFaultTolerance.redis.address -}}
{{- if not $gcs -}}
{{- fail "gcsFaultTolerance.redis.address is empty: name a Redis of Ray's own, or set gcsFaultTolerance.enabled to false" -}}
{{- end -}}
{{- $plain := regexReplaceAll "^rediss?://" $gcs "" -}}
{{- if eq $plain (regexReplaceAll "/[0-9]*$" (regexReplaceAll "^rediss?://" (include "echo-ray.redisUrl" .) "") "") -}}
{{- fail (printf "gcsFaultTolerance.redis.address %s is the server of the sessions: give Ray one of its own" $gcs) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "echo-ray.validateWeights" -}}
{{- $w := .Values.weights -}}
{{- if and (eq $w.source "pvc") (not $w.existingClaim) -}}
{{- fail "weights.source pvc needs a claim: set weights.existingClaim" -}}
{{- else if and (eq $w.source "objectStore") (not $w.uri) -}}
{{- fail "weights.source objectStore needs the folder's address: set weights.uri to s3://BUCKET/PREFIX" -}}
{{- else if and $w.existingClaim (ne $w.source "pvc") -}}
{{- fail (printf "weights.existingClaim is set but weights.source is %s: set it to pvc, or clear the claim" $w.source) -}}
{{- else if and $w.uri (ne $w.source "objectStore") -}}
{{- fail (printf "weights.uri is set but weights.source is %s: set it to objectStore, or clear the address" $w.source) -}}
{{- else if and (eq $w.source "preset") (hasPrefix "echo-infinity" .Values.model.preset) -}}
{{- fail (printf "the preset %s has no weights in the package: set weights.source to image, pvc or objectStore" .Values.model.preset) -}}
{{- end -}}
{{- end -}}

{{/* What the chart decides itself may not be said a second time. */}}
{{- define "echo-ray.validateOwned" -}}
{{- $owned := dict
  "config.model.preset" "model.preset"
  "config.model.device" "model.device"
  "config.model.weights" "weights.path"
  "config.session.drain_s" "drain.sessionSeconds"
  "config.storage.backend" "storage.backend"
  "config.storage.redis.url" "storage.redis.url"
  "config.storage.redis.password_env" "storage.redis.existingSecret"
  "config.storage.s3.bucket" "storage.s3.bucket"
  "config.access.enabled" "access.enabled"
  "config.access.tokens_file" "access.existingSecret"
  "config.access.viewer_secret_file" "access.existingSecret"
  "config.access.viewer_secret_env" "access.existingSecret"
  "config.access.replica_secret_file" "access.existingSecret"
  "config.access.replica_secret_env" "access.existingSecret"
  "config.http.port" "the Service and the Ingress, which expect 8000"
  "config.http.replica_port" "the PodMonitor and the probes, which expect 8001"
  "serve.generator.num_replicas" "replicas of the generator groups"
  "serve.generator.autoscaling_config" "autoscaling.generator"
  "serve.generator.graceful_shutdown_timeout_s" "drain.replicaSeconds"
  "serve.router.num_replicas" "replicas of the router groups"
  "autoscaling.generator.min_replicas" "minReplicas of the generator groups"
  "autoscaling.generator.max_replicas" "maxReplicas of the generator groups"
-}}
{{- range $path, $instead := $owned -}}
{{- $node := $.Values -}}
{{- range splitList "." $path -}}
{{- $node = ternary (get (default dict $node) .) "" (kindIs "map" $node) -}}
{{- end -}}
{{- if not (kindIs "string" $node | and (eq (toString $node) "")) -}}
{{- fail (printf "%s is decided by %s: set that instead" $path $instead) -}}
{{- end -}}
{{- end -}}
{{- end -}}
