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
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Metadata of an object of the release. Takes root, name, and perhaps labels and annotations (dicts). */}}
{{- define "vllm-sparse.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "vllm-sparse.labels" .root | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with mergeOverwrite (deepCopy .root.Values.commonAnnotations) (default dict .annotations) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/*
The helpers below take a "server": a dict of root, name (the key under `models`) and model (its settings, the defaults
merged in). `vllm-sparse.model` makes the last as JSON.
*/}}
{{- define "vllm-sparse.model" -}}
{{- mergeOverwrite (deepCopy .root.Values.modelDefaults) (default dict (get .root.Values.models .name)) | toJson -}}
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
