# SPDX-License-Identifier: GPL-3.0-or-later
# docker build -t nbdrs .
# docker run -p 10809:10809 -v /srv/disks:/disks nbdrs -e disk0 raw file:/disks/ --listen 0.0.0.0:10809
FROM debian:bookworm-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends make
WORKDIR /src
COPY Makefile ./
COPY tests/run/deps tests/run/
RUN make deps-build
COPY . .
RUN make -j"$(nproc)" install DESTDIR=/out PREFIX=/usr

FROM debian:bookworm-slim
RUN apt-get update \
	&& apt-get install -y --no-install-recommends \
		ca-certificates libcurl4 libexpat1 libjansson4 libnl-3-200 libnl-genl-3-200 libssl3 \
		libsystemd0 liburing2 \
	&& rm -rf /var/lib/apt/lists/*
COPY --from=build /out/ /
EXPOSE 10809
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/sbin/nbdrsd"]
