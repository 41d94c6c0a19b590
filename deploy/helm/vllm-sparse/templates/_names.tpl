{{- define "vllm-sparse.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "vllm-sparse.serviceAccountName" -}}
{{- default (ternary (include "vllm-sparse.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end }}

{{/* Labels that selectors use: they never change while a release lives. */}}
{{- define "vllm-sparse.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Labels of an object of the release. */}}
{{- define "vllm-sparse.labels" -}}
{{ include "vllm-sparse.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ include "vllm-sparse.texts" . }}
{{- end }}
{{- end }}

{{/* A map whose values Kubernetes wants as texts; numbers and booleans become such. */}}
{{- define "vllm-sparse.texts" -}}
{{- $texts := dict -}}
{{- range $key, $value := . -}}
{{- $_ := set $texts $key (include "vllm-sparse.text" $value) -}}
{{- end -}}
{{- toYaml $texts -}}
{{- end }}

{{- define "vllm-sparse.text" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end }}

{{/* A number or a share such as 25%. */}}
{{- define "vllm-sparse.numberOrShare" -}}
{{- if hasSuffix "%" (toString .) }}{{ quote . }}{{ else }}{{ int . }}{{ end -}}
{{- end }}

{{/* `imagePullSecrets` of a pod: the release's and the model's, each a name or {name: ...}. */}}
{{- define "vllm-sparse.pullSecrets" -}}
{{- $secrets := list -}}
{{- range concat .root.Values.imagePullSecrets .model.image.pullSecrets -}}
{{- $secrets = append $secrets (ternary (dict "name" .) . (kindIs "string" .)) -}}
{{- end -}}
{{- with uniq $secrets -}}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end }}

{{/* `storageClassName` of a claim; `-` asks for none at all, nothing for the cluster's default. */}}
{{- define "vllm-sparse.storageClass" -}}
{{- if . }}
storageClassName: {{ ternary "" . (eq . "-") | quote }}
{{- end -}}
{{- end }}

{{/* Metadata of an object of the release. Takes root, name, and perhaps labels and annotations (dicts). */}}
{{- define "vllm-sparse.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "vllm-sparse.texts" (mergeOverwrite (include "vllm-sparse.labels" .root | fromYaml) (default dict .labels)) | nindent 2 }}
{{- with mergeOverwrite (deepCopy .root.Values.commonAnnotations) (default dict .annotations) }}
annotations:
  {{- include "vllm-sparse.texts" . | nindent 2 }}
{{- end }}
{{- end }}

{{/*
The helpers below take a "server": a dict of root, name (the key under `models`) and model (its settings, the defaults
merged in). `vllm-sparse.model` makes the last as JSON.
*/}}
{{- define "vllm-sparse.model" -}}
{{- $defaults := .root.Values.modelDefaults -}}
{{- $own := default dict (get .root.Values.models .name) -}}
{{- $model := mergeOverwrite (deepCopy (omit $defaults "env")) (omit $own "env") -}}
{{- $entries := concat (include "vllm-sparse.environmentEntries" $defaults.env | fromJsonArray) (include "vllm-sparse.environmentEntries" $own.env | fromJsonArray) -}}
{{- set $model "env" $entries | toJson -}}
{{- end }}

{{/* Environment variables, from a map or a list, as a list of {name, and value, valueFrom or nothing, which removes it}. */}}
{{- define "vllm-sparse.environmentEntries" -}}
{{- $entries := list -}}
{{- if kindIs "slice" . -}}
{{- $entries = . -}}
{{- else -}}
{{- range $name, $value := . -}}
{{- $entry := dict "value" $value -}}
{{- if kindIs "map" $value -}}
{{- $entry = $value -}}
{{- else if kindIs "invalid" $value -}}
{{- $entry = dict -}}
{{- end -}}
{{- $entries = append $entries (merge (dict "name" $name) $entry) -}}
{{- end -}}
{{- end -}}
{{- toJson $entries -}}
{{- end }}

{{/* Devices that share each layer. */}}
{{- define "vllm-sparse.tensorParallel" -}}
{{- $parallelism := .model.parallelism -}}
{{- with int $parallelism.tensor -}}
{{- . -}}
{{- else -}}
{{- div (mul (int .model.accelerator.count) (int .model.nodes)) (mul (int $parallelism.pipeline) (int $parallelism.data)) -}}
{{- end -}}
{{- end }}

{{/* "true" if the model comes from a volume, as a whole below /models. */}}
{{- define "vllm-sparse.modelVolume" -}}
{{- with .model.source }}{{ if or .claim .hostPath .image }}true{{ end }}{{ end -}}
{{- end }}

{{/* "true" if an init container looks at the devices. What other resources than NVIDIA's are, it cannot tell. */}}
{{- define "vllm-sparse.checksDevices" -}}
{{- with .model.accelerator }}{{ if and .check (gt (int .count) 0) (or .claims (hasPrefix "nvidia.com/" .resource)) }}true{{ end }}{{ end -}}
{{- end }}

{{/* Where a route sends requests: the model's pool, or its service. */}}
{{- define "vllm-sparse.backend" -}}
{{- if .model.inferencePool.enabled -}}
group: inference.networking.k8s.io
kind: InferencePool
name: {{ include "vllm-sparse.serverName" . }}
{{- else -}}
name: {{ include "vllm-sparse.serverName" . }}
port: {{ int .model.service.port }}
{{- end -}}
{{- end }}

{{/* Names that requests may call: the model's and those of its adapters. */}}
{{- define "vllm-sparse.requestNames" -}}
{{- concat (include "vllm-sparse.servedNames" . | fromJsonArray) (keys .model.lora.adapters | sortAlpha) | toJson -}}
{{- end }}

{{- define "vllm-sparse.serverName" -}}
{{- printf "%s-%s" (include "vllm-sparse.fullname" .root) .name -}}
{{- end }}

{{/* What finds the pods of one model. */}}
{{- define "vllm-sparse.serverSelector" -}}
{{ include "vllm-sparse.selectorLabels" .root }}
vllm-sparse/model: {{ .name }}
{{- end }}

{{/* What finds those of them that answer requests. */}}
{{- define "vllm-sparse.apiSelector" -}}
{{ include "vllm-sparse.serverSelector" . }}
app.kubernetes.io/component: server
{{- end }}

{{- define "vllm-sparse.serverMetadata" -}}
{{- include "vllm-sparse.metadata" (dict "root" .root "name" (include "vllm-sparse.serverName" .) "labels" (dict "vllm-sparse/model" .name) "annotations" .annotations) -}}
{{- end }}

{{- define "vllm-sparse.servedNames" -}}
{{- default (list .name) .model.servedNames | toJson -}}
{{- end }}

{{- define "vllm-sparse.image" -}}
{{- $image := .model.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- $device := ternary "cuda" "cpu" (gt (int .model.accelerator.count) 0) -}}
{{- printf "%s:%s" $image.repository (default (printf "%s-%s" .root.Chart.AppVersion $device) $image.tag) -}}
{{- end -}}
{{- end }}

{{- define "vllm-sparse.cacheClaim" -}}
{{- if eq .model.cache.kind "existingClaim" -}}
{{- .model.cache.existingClaim -}}
{{- else -}}
{{- printf "%s-cache" (include "vllm-sparse.serverName" .) -}}
{{- end -}}
{{- end }}

{{/* Job of the load test, and its scenario. */}}
{{- define "vllm-sparse.loadTestName" -}}
{{- printf "%s-load-%s" (include "vllm-sparse.serverName" .) .model.loadTest.run -}}
{{- end }}

{{- define "vllm-sparse.resultsClaim" -}}
{{- default (printf "%s-results" (include "vllm-sparse.serverName" .)) .model.loadTest.results.existingClaim -}}
{{- end }}

{{/* "true" if an object that needs a CRD is wanted. Takes root, create (always, never, auto) and api. */}}
{{- define "vllm-sparse.wanted" -}}
{{- if or (eq .create "always") (and (eq .create "auto") (.root.Capabilities.APIVersions.Has .api)) -}}true{{- end -}}
{{- end }}

{{/* Sampling extras of `helm test`; null takes a default's key away. */}}
{{- define "vllm-sparse.testExtras" -}}
{{- $extras := dict -}}
{{- range $key, $value := .model.test.extras -}}
{{- if not (kindIs "invalid" $value) -}}
{{- $_ := set $extras $key $value -}}
{{- end -}}
{{- end -}}
{{- toJson $extras -}}
{{- end }}
