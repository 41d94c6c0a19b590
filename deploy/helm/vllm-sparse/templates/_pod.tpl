{{/* Arguments of vllm serve. Takes a server with role: server or worker (of several nodes). */}}
{{- define "vllm-sparse.arguments" -}}
{{- $model := .model -}}
- {{ ternary (printf "/models/%s" $model.source.path | trimSuffix "/") (default $model.source.hub $model.source.s3) (eq (include "vllm-sparse.modelVolume" .) "true") }}
{{- with $model.source.revision }}
- --revision={{ . }}
{{- end }}
- --served-model-name
{{- range include "vllm-sparse.servedNames" . | fromJsonArray }}
- {{ . | quote }}
{{- end }}
- --port=8000
- --attention-backend=sparse
- --shutdown-timeout={{ int $model.drain.requestSeconds }}
- --dtype={{ $model.engine.dtype }}
{{- if gt (int $model.accelerator.count) 0 }}
- --gpu-memory-utilization={{ $model.engine.gpuMemoryUtilization }}
- --tensor-parallel-size={{ include "vllm-sparse.tensorParallel" . }}
{{- if gt (int $model.parallelism.pipeline) 1 }}
- --pipeline-parallel-size={{ int $model.parallelism.pipeline }}
{{- end }}
{{- if gt (int $model.parallelism.data) 1 }}
- --data-parallel-size={{ int $model.parallelism.data }}
{{- end }}
{{- end }}
{{- if gt (int $model.nodes) 1 }}
- --nnodes={{ int $model.nodes }}
- --node-rank=$(LWS_WORKER_INDEX)
- --master-addr=$(LWS_LEADER_ADDRESS)
{{- if eq .role "worker" }}
- --headless
{{- end }}
{{- end }}
{{- with int $model.engine.maxModelLen }}
- --max-model-len={{ . }}
{{- end }}
{{- with int $model.engine.maxNumBatchedTokens }}
- --max-num-batched-tokens={{ . }}
{{- end }}
{{- with int $model.engine.maxNumSeqs }}
- --max-num-seqs={{ . }}
{{- end }}
{{- $additional := deepCopy $model.additionalConfig }}
{{- if $model.sparse }}
{{- $_ := set $additional "sparse" $model.sparse }}
{{- end }}
{{- with $additional }}
- {{ printf "--additional-config=%s" (toJson .) | quote }}
{{- end }}
{{- with $model.tracing.endpoint }}
- --otlp-traces-endpoint={{ . }}
{{- end }}
{{- if $model.presetHeader }}
- --middleware=vllm_sparse.server.preset_header.PresetHeader
{{- end }}
{{- with $model.lora.adapters }}
- --enable-lora
- --max-lora-rank={{ int $model.lora.maxRank }}
{{- with int $model.lora.maxAdapters }}
- --max-loras={{ . }}
{{- end }}
- --lora-modules
{{- range $name, $place := . }}
- {{ printf "%s=%s" $name $place | quote }}
{{- end }}
{{- end }}
{{- range $model.extraArgs }}
- {{ include "vllm-sparse.text" . | quote }}
{{- end }}
{{- end }}

{{- define "vllm-sparse.environment" -}}
{{- $model := .model -}}
{{- $environment := dict "HOME" "/var/cache/vllm-sparse" "USER" "vllm" "TORCHINDUCTOR_CACHE_DIR" "/var/cache/vllm-sparse/.cache/torchinductor" -}}
{{- if not $model.source.hub -}}
{{- $_ := set $environment "HF_HUB_OFFLINE" "1" -}}
{{- end -}}
{{- if eq (int $model.accelerator.count) 0 -}}
{{- $_ := set $environment "VLLM_CPU_KVCACHE_SPACE" (toString (int $model.engine.cpuKvCacheGiB)) -}}
{{- end -}}
{{- if $model.tracing.endpoint -}}
{{- $_ := mergeOverwrite $environment (dict "OTEL_SERVICE_NAME" (include "vllm-sparse.serverName" .) "OTEL_TRACES_SAMPLER" "parentbased_traceidratio" "OTEL_TRACES_SAMPLER_ARG" (toString $model.tracing.ratio)) -}}
{{- end -}}
{{- /* The same name again replaces what came before. */}}
{{- $names := list -}}
{{- $entries := dict -}}
{{- range $model.env -}}
{{- $environment = omit $environment .name -}}
{{- $names = append (without $names .name) .name -}}
{{- $_ := set $entries .name . -}}
{{- end -}}
{{- range $name, $value := $environment }}
- name: {{ $name | quote }}
  value: {{ $value | quote }}
{{- end }}
{{- range $names }}
{{- $entry := get $entries . }}
{{- if hasKey $entry "valueFrom" }}
- name: {{ . | quote }}
  valueFrom:
    {{- toYaml $entry.valueFrom | nindent 4 }}
{{- else if hasKey $entry "value" }}
- name: {{ . | quote }}
  value: {{ include "vllm-sparse.text" $entry.value | quote }}
{{- end }}
{{- end }}
{{- if gt (int $model.nodes) 1 }}
- name: VLLM_HOST_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
{{- end }}
{{- with $model.hubToken }}
{{- if .existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- include "vllm-sparse.apiKey" . }}
{{- end }}

{{- define "vllm-sparse.apiKey" -}}
{{- with .model.apiKey }}
{{- if .existingSecret }}
- name: VLLM_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .existingSecret }}
      key: {{ .key }}
{{- end }}
{{- end }}
{{- end }}

{{/* Resources of a container that has the devices. */}}
{{- define "vllm-sparse.resources" -}}
{{- $accelerator := .model.accelerator -}}
{{- $devices := dict -}}
{{- if and (gt (int $accelerator.count) 0) (not $accelerator.claims) -}}
{{- $devices = dict $accelerator.resource (int $accelerator.count) -}}
{{- end -}}
requests:
  {{- mergeOverwrite (deepCopy (default dict .model.resources.requests)) $devices | toYaml | nindent 2 }}
limits:
  {{- mergeOverwrite (deepCopy (default dict .model.resources.limits)) $devices | toYaml | nindent 2 }}
{{- with $accelerator.claims }}
claims:
  {{- range . }}
  - name: {{ .name }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "vllm-sparse.probes" -}}
{{- $probes := .model.probes -}}
startupProbe:
  httpGet:
    path: /health
    port: http
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: {{ div (add (int $probes.startupSeconds) 9) 10 }}
readinessProbe:
  {{- if $probes.modelReadiness }}
  exec:
    command:
      - python3
      - /etc/vllm-sparse/scripts/ready.py
      - http://127.0.0.1:8000
      {{- range include "vllm-sparse.servedNames" . | fromJsonArray }}
      - {{ . | quote }}
      {{- end }}
  {{- else }}
  httpGet:
    path: /health
    port: http
  {{- end }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
livenessProbe:
  httpGet:
    path: /health
    port: http
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: {{ div (add (int $probes.livenessSeconds) 9) 10 }}
{{- end }}

{{/* Pod template (metadata and spec). Takes a server with role. */}}
{{- define "vllm-sparse.podTemplate" -}}
{{- $root := .root -}}
{{- $model := .model -}}
{{- $serves := eq .role "server" -}}
metadata:
  {{- /* Neither the chart's version nor the scripts of others: a change of either would reload every model. */}}
  labels:
    {{- include "vllm-sparse.serverSelector" . | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
    {{- with mergeOverwrite (deepCopy $root.Values.commonLabels) $model.podLabels }}
    {{- include "vllm-sparse.texts" . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ list (ternary (include "vllm-sparse.scripts" $root) "" $model.probes.modelReadiness) $model.files | toJson | sha256sum }}
    {{- with mergeOverwrite (deepCopy $root.Values.commonAnnotations) $model.podAnnotations }}
    {{- include "vllm-sparse.texts" . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "vllm-sparse.serviceAccountName" $root }}
  automountServiceAccountToken: false
  # A service named vllm would set VLLM_PORT, which vLLM reads as its own.
  enableServiceLinks: false
  {{- with include "vllm-sparse.pullSecrets" . }}
  {{- . | nindent 2 }}
  {{- end }}
  terminationGracePeriodSeconds: {{ add (int $model.drain.endpointSeconds) (int $model.drain.requestSeconds) (int $model.drain.teardownSeconds) }}
  securityContext:
    {{- toYaml $model.podSecurityContext | nindent 4 }}
  {{- with $model.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $model.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $model.nodeSelector }}
  nodeSelector:
    {{- include "vllm-sparse.texts" . | nindent 4 }}
  {{- end }}
  {{- with $model.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $model.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $model.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    - {{- toYaml . | nindent 6 }}
      {{- if not .labelSelector }}
      labelSelector:
        matchLabels:
          {{- include "vllm-sparse.serverSelector" $ | nindent 10 }}
      {{- end }}
    {{- end }}
  {{- end }}
  {{- with $model.accelerator.claims }}
  resourceClaims:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- $checksDevices := eq (include "vllm-sparse.checksDevices" .) "true" }}
  {{- if or $checksDevices $model.initContainers }}
  initContainers:
    {{- if $checksDevices }}
    - name: device
      # The server's image, its devices and its request: it needs nothing more of the node than the server does.
      image: {{ include "vllm-sparse.image" . | quote }}
      imagePullPolicy: {{ $model.image.pullPolicy }}
      command: [python3, /etc/vllm-sparse/scripts/device.py]
      args:
        - {{ int $model.accelerator.count | quote }}
        - {{ printf "models.%s" .name | quote }}
      resources:
        {{- include "vllm-sparse.resources" . | nindent 8 }}
      securityContext:
        {{- toYaml $model.securityContext | nindent 8 }}
      volumeMounts:
        - name: scripts
          mountPath: /etc/vllm-sparse/scripts
          readOnly: true
        - name: tmp
          mountPath: /tmp
    {{- end }}
    {{- with $model.initContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: server
      image: {{ include "vllm-sparse.image" . | quote }}
      imagePullPolicy: {{ $model.image.pullPolicy }}
      command: [vllm, serve]
      args:
        {{- include "vllm-sparse.arguments" . | nindent 8 }}
      env:
        {{- include "vllm-sparse.environment" . | nindent 8 }}
      {{- with $model.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- if $serves }}
      ports:
        - name: http
          containerPort: 8000
      {{- include "vllm-sparse.probes" . | nindent 6 }}
      {{- end }}
      {{- /* A worker that went first would take the requests that its server still has. */}}
      {{- with ternary (int $model.drain.endpointSeconds) (add (int $model.drain.endpointSeconds) (int $model.drain.requestSeconds)) $serves }}
      lifecycle:
        preStop:
          sleep:
            seconds: {{ . }}
      {{- end }}
      resources:
        {{- include "vllm-sparse.resources" . | nindent 8 }}
      securityContext:
        {{- toYaml $model.securityContext | nindent 8 }}
      volumeMounts:
        - name: cache
          mountPath: /var/cache/vllm-sparse
        - name: tmp
          mountPath: /tmp
        - name: shm
          mountPath: /dev/shm
        {{- if eq (include "vllm-sparse.modelVolume" .) "true" }}
        - name: model
          mountPath: /models
          readOnly: true
        {{- end }}
        {{- if $model.probes.modelReadiness }}
        - name: scripts
          mountPath: /etc/vllm-sparse/scripts
          readOnly: true
        {{- end }}
        {{- if $model.files }}
        - name: files
          mountPath: /etc/vllm-sparse/files
          readOnly: true
        {{- end }}
        {{- with $model.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- with $model.sidecars }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    - name: cache
      {{- if eq $model.cache.kind "emptyDir" }}
      emptyDir:
        sizeLimit: {{ $model.cache.size }}
      {{- else }}
      persistentVolumeClaim:
        claimName: {{ include "vllm-sparse.cacheClaim" . }}
      {{- end }}
    - name: tmp
      emptyDir:
        sizeLimit: {{ $model.temporarySpace }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $model.sharedMemory }}
    {{- with $model.source.claim }}
    - name: model
      persistentVolumeClaim:
        claimName: {{ . }}
        readOnly: true
    {{- end }}
    {{- with $model.source.hostPath }}
    - name: model
      hostPath:
        path: {{ . }}
        type: Directory
    {{- end }}
    {{- with $model.source.image }}
    - name: model
      image:
        reference: {{ . | quote }}
        pullPolicy: {{ $model.image.pullPolicy }}
    {{- end }}
    {{- if or $checksDevices $model.probes.modelReadiness }}
    - name: scripts
      configMap:
        name: {{ include "vllm-sparse.fullname" $root }}-scripts
    {{- end }}
    {{- if $model.files }}
    - name: files
      configMap:
        name: {{ include "vllm-sparse.serverName" . }}-files
    {{- end }}
    {{- with $model.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
